"""The traced network and its axes. The only room that knows torch.export and ATen operators."""
