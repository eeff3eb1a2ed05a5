"""The SICOG library: records and prompts, the LLaVA-UHD model, training, generation and evaluation.

Stage folders (`training_data_annotation`, `quality_evaluation`, the scripts) import this package; it imports none of
them. Importing it loads nothing heavy.
"""
