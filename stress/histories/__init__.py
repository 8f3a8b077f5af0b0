"""Short histories of concurrent operations, and whether some order of them explains what each of them saw."""
