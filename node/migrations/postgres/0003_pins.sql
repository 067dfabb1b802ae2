-- A document with a slot of its own: the row of a virtual slot, whose number is at least control.slots, names
-- it. A virtual slot that names none is free to be used again; its epoch goes on.
alter table slot add column document text collate "C";
create unique index slot_of_document on slot (document);
