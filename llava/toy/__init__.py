"""The embedded default: a synthetic visual world in the real file formats, with a small CLIP tower, a small Qwen2 and
an offline annotator. Only the quickstart and the tests use it; nothing in `llava` imports it.
"""
