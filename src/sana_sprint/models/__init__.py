"""Networks as plain `torch.nn.Module`s: import each from its own module, so that importing one loads no other."""
