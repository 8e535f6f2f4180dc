"""The model, for whoever builds or loads one from Python; it lives in c2al.training.model.

::

    from c2al.model import C2ALModel, primary_prediction
"""

from c2al.training.model import C2ALModel, TrainTask, primary_prediction

__all__ = ["C2ALModel", "TrainTask", "primary_prediction"]
