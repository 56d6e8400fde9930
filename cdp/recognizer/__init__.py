"""The low-resolution recognizer: training, embedding, ONNX export."""

from cdp.recognizer.fit import select_classes, train_recognizer
from cdp.recognizer.recognizer import Recognizer

__all__ = ["Recognizer", "select_classes", "train_recognizer"]
