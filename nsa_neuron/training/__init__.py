"""Training small byte-level models: texts, recall tasks, a loop that can be stopped and resumed."""

from nsa_neuron.training.corpus import Corpus, python_corpus
from nsa_neuron.training.loop import TrainConfig, evaluate, train
from nsa_neuron.training.tasks import Batch, MultiQueryRecall, Task, Text

__all__ = [
    "Batch",
    "Corpus",
    "MultiQueryRecall",
    "Task",
    "Text",
    "TrainConfig",
    "evaluate",
    "python_corpus",
    "train",
]
