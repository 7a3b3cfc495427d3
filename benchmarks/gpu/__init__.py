"""What is to be known on a GPU, measured in minutes and written into one file."""
