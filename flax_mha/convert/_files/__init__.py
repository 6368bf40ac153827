"""Files and folders of tensors: what is in them, read as it is needed, and written."""
