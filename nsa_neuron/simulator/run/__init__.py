"""Running a kernel: arguments in, results out, capacity checked at the end."""
