"""An HTTP server for one model: one engine thread owns the device, and batches the requests of many clients."""
