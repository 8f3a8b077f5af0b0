"""What programs here print: tables of 80 columns, where their figures are from, and how far work is."""
