-- As in Postgres.
alter table slot add column document text;
create unique index slot_of_document on slot (document);
