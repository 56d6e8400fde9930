"""Exports of a finished run for other programs.

`__main__` is the command; `labels` exports pseudo-labels and their images, `recognizer` a trained
recognizer as ONNX, `degradations` a picture of degraded faces.
"""
