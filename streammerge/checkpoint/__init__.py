"""Open models: their tensors and the positions of their bytes, read from headers."""

from streammerge.checkpoint.index import TensorIndex, open_model
from streammerge.formats.refs import TensorRef
from streammerge.formats.safetensors import read_header
from streammerge.io.stamp import FileStamp

__all__ = ["FileStamp", "TensorIndex", "TensorRef", "open_model", "read_header"]
