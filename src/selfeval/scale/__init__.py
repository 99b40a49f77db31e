"""Work on several processes and machines, by Ray. The only package that imports Ray, and only where it is used."""
