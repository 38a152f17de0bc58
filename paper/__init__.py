"""What notebook 09 draws and tells: the papers' tables beside a run's, and the numbers of a README."""
