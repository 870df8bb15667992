"""Released models in Hugging Face folders, read and written."""
