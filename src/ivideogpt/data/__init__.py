"""Episodes, shards, clips and the data module. Knows `config` and `layout` and nothing above them."""

from ivideogpt.data.datamodule import VideoDataModule
from ivideogpt.data.episode import Episode
from ivideogpt.data.reader import ShardError, ShardSet
from ivideogpt.data.shards import ShardSetWriter

__all__ = ["Episode", "ShardError", "ShardSet", "ShardSetWriter", "VideoDataModule"]
