"""How fast gnbench trains, beside a plain loop and the limit of the hardware."""
