"""The low-resolution recognizer: how it is trained, used and exported.

- `fit.py`: `train_recognizer` on a labelled and a pseudo-labelled `FaceSet`, by a `RecognizerSpec`
- `recognizer.py`: `Recognizer`, which loads, embeds and saves
- `pretrained.py`: `open_pretrained`, an ONNX model as a backbone to be trained further
- `gallery.py`: `Gallery`, enrolled people in whom faces are identified
- `onnx_export.py`: a recognizer as an ONNX model, checked in onnxruntime
- `identity_matching.py`: pseudo-label clusters that match a labelled identity
"""

from cdp.recognizer.fit import FaceSet, RecognizerSpec, select_classes, train_recognizer
from cdp.recognizer.gallery import Gallery
from cdp.recognizer.onnx_export import export_onnx
from cdp.recognizer.pretrained import open_pretrained
from cdp.recognizer.recognizer import Recognizer

__all__ = [
    "FaceSet",
    "Gallery",
    "Recognizer",
    "RecognizerSpec",
    "export_onnx",
    "open_pretrained",
    "select_classes",
    "train_recognizer",
]
