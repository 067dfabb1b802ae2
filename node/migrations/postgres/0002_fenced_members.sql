-- A member whose lease was ended by another one: it may not renew it, and registers as a new incarnation if it lives.
alter table member add column fenced boolean not null default false;
