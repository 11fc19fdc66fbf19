"""`python tests/helpers/keeping.py CONFIG.json`: execute a run and keep its last checkpoint."""

from hloss.runs import __main__, run

if __name__ == "__main__":
    run.remove_checkpoints = lambda folder: None
    __main__.main()
