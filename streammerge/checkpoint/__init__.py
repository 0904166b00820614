"""What a model holds and where its bytes lie, read from headers alone."""

from streammerge.checkpoint.index import TensorIndex, open_model
from streammerge.formats.refs import TensorRef
from streammerge.formats.safetensors import read_header
from streammerge.io.stamp import FileStamp

__all__ = ["FileStamp", "TensorIndex", "TensorRef", "open_model", "read_header"]
