"""Translation over HTTP: LibreTranslate's interface and one of our own, in front of the native engine.

What runs it needs the extra ``serve``, neither torch nor transformers:

    from hf_nmsparse.serve import create_app, load_models

    app = create_app(load_models(["en:de=outputs/demo/packed"], threads=2))
"""

from hf_nmsparse.serve.app import create_app
from hf_nmsparse.serve.limits import Limits
from hf_nmsparse.serve.models import Models, load_models

__all__ = ["Limits", "Models", "create_app", "load_models"]
