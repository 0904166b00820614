"""What a model holds and where its bytes lie, read from headers alone."""

from streammerge.checkpoint.index import TensorIndex, open_model
from streammerge.formats.safetensors import FileStamp, TensorRef, read_header

__all__ = ["FileStamp", "TensorIndex", "TensorRef", "open_model", "read_header"]
