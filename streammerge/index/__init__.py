"""What a model holds and where its bytes lie, read from headers alone."""

from streammerge.index.header import FileStamp, TensorRef, read_header
from streammerge.index.model import TensorIndex, open_model

__all__ = ["FileStamp", "TensorIndex", "TensorRef", "open_model", "read_header"]
