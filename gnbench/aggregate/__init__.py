"""From run directories to tables, figures and words."""
