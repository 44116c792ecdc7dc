"""From data files to token ids with the targets marked, and from those to batches."""
