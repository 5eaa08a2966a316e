"""Everything that can be wrong with a GGUF file, each kind with its own name.

GGUFError
├── FileUnreadableError             the operating system does not open or map the file
├── NotGGUFError                    the file does not start with the magic
├── TruncatedFileError              the file ends before its header says so: an unfinished download
├── ClosedFileError                 something was asked of a file after close()
├── HeaderError
│   ├── UnsupportedVersionError     neither version 2 nor 3
│   ├── BigEndianError              written for big-endian machines
│   └── CountError                  more tensors or keys than any model has
├── MetadataError
│   ├── KeyNameError                a key is empty, too long or not UTF-8
│   ├── DuplicateKeyError           a key appears twice
│   ├── UnknownValueTypeError       a value has a type the specification does not know
│   ├── NestedArrayError            an array of arrays
│   ├── StringLengthError           a string longer than any model needs
│   ├── ArrayLengthError            an array longer than any model needs
│   ├── StringEncodingError         a string is not UTF-8
│   ├── BoolValueError              a bool is neither 0 nor 1
│   └── AlignmentError              general.alignment is no usable power of two
├── TensorError
│   ├── TensorNameError             a name is empty, too long or not UTF-8
│   ├── DuplicateTensorError        a name appears twice
│   ├── MissingTensorError          a tensor was asked for that the file does not have
│   ├── DimensionCountError         more than five dimensions
│   ├── TensorShapeError            a dimension of zero, or more values than any file holds
│   ├── UnknownTensorTypeError      a type number that ggml never gave out
│   ├── UnsupportedTensorTypeError  a type that ggml knows and this pack does not decode
│   ├── RowSizeError                a row is not a whole number of blocks
│   ├── TensorOffsetError           an offset beyond any file
│   ├── MisalignedOffsetError       an offset is not a multiple of the alignment
│   └── OverlapError                two tensors share bytes
├── ShardError
│   ├── ShardNameError              a part of a split file whose name does not say which part it is
│   ├── NotFirstShardError          a later part was opened instead of the first
│   ├── MissingShardError           a part is not beside the first
│   └── ShardMismatchError          the parts do not belong together
└── ModelError
    ├── OriginalShapeError          comfy.gguf.orig_shape says something that cannot be
    ├── UnknownModelError           the tensors are of no model that the host knows
    ├── WrongShapeError             a tensor cannot be the weight that the model wants
    ├── IncompleteModelError        layers of the model have no weight in the file
    └── TextEncoderError
        ├── UnknownTextEncoderError      the tensors are of no text encoder that is known
        ├── AmbiguousTextEncoderError    more than one text encoder in one file
        ├── UnsupportedTextEncoderError  a text encoder of sizes that ComfyUI cannot build
        ├── IncompleteTextEncoderError   the encoders of the chosen type lack tensors
        └── MissingTokenizerError        no vocabulary where the encoder needs its own
"""


class GGUFError(Exception):
    """Base of every error this pack raises about a GGUF file; the message says what, where and what to do."""


class FileUnreadableError(GGUFError):
    """The operating system does not open or map the file."""


class NotGGUFError(GGUFError):
    """The file does not start with the magic `GGUF`."""


class TruncatedFileError(GGUFError):
    """The file ends before its header says so; `missing_bytes` is how many more it needs at least."""

    def __init__(self, message: str, missing_bytes: int):
        super().__init__(message)
        self.missing_bytes = missing_bytes


class ClosedFileError(GGUFError):
    """Something was asked of a file after close()."""


class HeaderError(GGUFError):
    """The fixed part of the header is wrong."""


class UnsupportedVersionError(HeaderError):
    """Neither version 2 nor version 3."""


class BigEndianError(HeaderError):
    """Written for big-endian machines."""


class CountError(HeaderError):
    """tensor_count or metadata_kv_count is larger than any model's."""


class MetadataError(GGUFError):
    """A key-value pair is wrong."""


class KeyNameError(MetadataError):
    """A key is empty, too long or not UTF-8."""


class DuplicateKeyError(MetadataError):
    """A key appears twice."""


class UnknownValueTypeError(MetadataError):
    """A value or array element has a type number outside 0-12."""


class NestedArrayError(MetadataError):
    """An array of arrays: no known model needs one, and llama.cpp refuses it too."""


class StringLengthError(MetadataError):
    """A string value is longer than any model needs."""


class ArrayLengthError(MetadataError):
    """An array is longer than any model needs."""


class StringEncodingError(MetadataError):
    """A string value is not UTF-8."""


class BoolValueError(MetadataError):
    """A bool is neither 0 nor 1."""


class AlignmentError(MetadataError):
    """general.alignment is no power of two in the allowed range, or not a UINT32."""


class TensorError(GGUFError):
    """A tensor info is wrong."""


class TensorNameError(TensorError):
    """A tensor name is empty, too long or not UTF-8."""


class DuplicateTensorError(TensorError):
    """A tensor name appears twice."""


class MissingTensorError(TensorError):
    """A tensor was asked for that the file does not have."""


class DimensionCountError(TensorError):
    """A tensor has more than five dimensions."""


class TensorShapeError(TensorError):
    """A dimension is zero, or the tensor is larger than any file."""


class UnknownTensorTypeError(TensorError):
    """A tensor type number that ggml never gave out."""


class UnsupportedTensorTypeError(TensorError):
    """A tensor type that ggml knows by name and this pack does not decode."""


class RowSizeError(TensorError):
    """A row is not a whole number of blocks."""


class TensorOffsetError(TensorError):
    """A tensor offset is larger than any file."""


class MisalignedOffsetError(TensorError):
    """A tensor offset is not a multiple of the file's alignment."""


class OverlapError(TensorError):
    """Two tensors share bytes."""


class ShardError(GGUFError):
    """A file split into parts cannot be put together."""


class ShardNameError(ShardError):
    """The name of a part does not end in -NNNNN-of-NNNNN.gguf with its own numbers."""


class NotFirstShardError(ShardError):
    """A later part was opened instead of the first."""


class MissingShardError(ShardError):
    """A part is not beside the first."""


class ShardMismatchError(ShardError):
    """The parts do not belong together."""


class ModelError(GGUFError):
    """A sound file that does not make a model."""


class OriginalShapeError(ModelError):
    """`comfy.gguf.orig_shape` of a tensor is no shape, or not one of as many values."""


class UnknownModelError(ModelError):
    """The tensors are of no model that the host knows."""


class WrongShapeError(ModelError):
    """A tensor cannot be the weight that the model wants."""


class IncompleteModelError(ModelError):
    """Layers of the model have no weight in the file."""


class TextEncoderError(ModelError):
    """A sound file that does not make a text encoder."""


class UnknownTextEncoderError(TextEncoderError):
    """No row of TEXT_ENCODERS fits the tensors of a file."""


class AmbiguousTextEncoderError(TextEncoderError):
    """A file holds more than one text encoder."""


class UnsupportedTextEncoderError(TextEncoderError):
    """A text encoder of a size that ComfyUI cannot build for the chosen type."""


class IncompleteTextEncoderError(TextEncoderError):
    """The files lack tensors that the encoders of the chosen type have."""


class MissingTokenizerError(TextEncoderError):
    """The encoder needs a tokenizer and the file has none."""
