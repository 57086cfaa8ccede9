"""Files of other libraries: what stock peft and AdapterHub write, read and written here."""
