"""Which sizes a model's configuration sets: for models like those of Hugging Face transformers."""

from sparsekern.configs.fields import Skeleton as Skeleton
from sparsekern.configs.fields import class_of as class_of
from sparsekern.configs.fields import has_config as has_config
from sparsekern.configs.fit import Unsayable as Unsayable
from sparsekern.configs.fit import fitted as fitted
from sparsekern.configs.fit import opened as opened
from sparsekern.configs.refusal import refusal as refusal
from sparsekern.configs.ties import by_config as by_config
from sparsekern.configs.widths import layer_widths as layer_widths
