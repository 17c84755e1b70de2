"""``python -m gnbench.aggregate``: run directories → tables, figure and curves."""

from gnbench.aggregate.study import main

if __name__ == "__main__":
    main()
