"""Pictures for many: one engine thread that owns the device, and an HTTP server in front of it."""
