"""Tables, differences, plots and reports from run folders. Nothing here imports torch."""
