"""Read finished run folders: curves, speed-up (eta), routing maps, figures and the report; files only, no
torch.
"""
