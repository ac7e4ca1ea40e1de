"""Parts of finetune.py, predict.py and export.py."""
