"""Speed for the models, put on them from outside: on a CPU (`cpu`), and on CUDA (`cuda`)."""
