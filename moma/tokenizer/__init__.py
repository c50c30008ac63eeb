"""Text and images <-> vocabulary ids."""
