"""`python -m flax_mha`: the command line."""

from flax_mha._cli import program

if __name__ == "__main__":
    program()
