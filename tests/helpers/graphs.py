"""A stand-in for CUDA graphs that runs the function again into the same output."""


class FakeRecorder:
    """Like a graph, a recording sees only what stands in the places that its function read when it was made."""

    def __init__(self):
        self.recorded = 0

    def __call__(self, function):
        self.recorded += 1
        recording = type("Recording", (), {})()
        recording.output = function()
        recording.output.fill_(float("nan"))  # capturing computes nothing
        recording.replay = lambda: recording.output.copy_(function())
        return recording
