"""TorchX components and the configs they run."""
