"""Many runs by one command: the cells, where they stand, who carries them out."""
