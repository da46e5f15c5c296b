"""Documents with a translation in the place of their text, and all else as it was.

Each format has a module with one function, a `Reader`; `formats` is the table of them.
"""

from hf_nmsparse.documents.base import DocumentError, Options, Translate
from hf_nmsparse.documents.formats import FORMATS, check_options, format_of, translate_document

__all__ = ["FORMATS", "DocumentError", "Options", "Translate", "check_options", "format_of", "translate_document"]
