"""LLaVA-UHD as Hugging Face classes: configuration, image processing, processing and modeling, plus the tools that
build, convert and export checkpoints. Importing the package is free; each module registers its own classes with Auto*.
"""
