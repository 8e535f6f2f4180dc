"""c2al: Cohort-Contrastive Auxiliary Learning (arXiv 2510.02215) on TorchRec."""

__version__ = "0.1.0"
