"""What goes into a training: its images and its network, as figures and tables."""
