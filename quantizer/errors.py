"""What can go wrong while a model is converted, each kind with its own name.

QuantizerError
├── SourceError       the input is not a model that can be read
├── PartError         the input has not the one part that was asked for
├── RecipeError       the file type or the architecture is not known, or cannot be written
├── NotFiniteError    a value is NaN, infinite or too large for its type
├── ImportanceError   an importance file that is damaged or of another model
└── TargetError       the output must not or cannot be written
"""


class QuantizerError(Exception):
    """Base of every error of the converter; the message says what, where and what to do."""


class SourceError(QuantizerError):
    """The input is not a model that can be read."""


class PartError(QuantizerError):
    """The input has not the part that was asked for, or several that could be meant."""


class RecipeError(QuantizerError):
    """A file type or an architecture that is not known or cannot be written."""


class NotFiniteError(QuantizerError):
    """A source tensor holds NaN, infinity, or a value that its type cannot hold."""


class ImportanceError(QuantizerError):
    """An importance file that is damaged or belongs to another model."""


class TargetError(QuantizerError):
    """The output exists already, is an input too, or does not fit on the disk."""


class EncoderProcessError(QuantizerError):
    """One of the processes that quantise has ended before its work was done."""
