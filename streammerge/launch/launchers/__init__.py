"""The launchers that `merge --on` knows: one file each, by the name that it takes."""
