import os

# Figures go to files; a notebook's own backend is not for other processes.
os.environ["MPLBACKEND"] = "Agg"
