-- As in Postgres, for one process: there is one member, and it lives in memory.
-- Times are milliseconds since 1970 (UTC).

create table control (
  only_row integer not null unique default 1 check (only_row = 1),
  slots integer not null,
  term integer not null default 0,
  holder text not null default '',
  -- JSON array of node names, by slot.
  placement text not null default '[]',
  placement_version integer not null default 0,
  -- Rises with every change of a slot.
  revision integer not null default 0
) strict;

create table slot (
  slot integer primary key,
  owner blob,
  epoch integer not null default 0,
  revision integer not null default 0,
  adoptions integer not null default 0
) strict;

create table document (
  id text primary key,
  slot integer not null,
  room_epoch integer not null default 1,
  deleted integer not null default 0,
  base_seq integer not null default 0,
  created_at integer not null
) strict, without rowid;

create table update_log (
  document text not null,
  seq integer not null,
  slot integer not null,
  epoch integer not null,
  crc32c integer not null,
  bytes blob not null,
  author text not null,
  at integer not null,
  primary key (document, seq)
) strict;

create table snapshot (
  document text not null,
  seq integer not null,
  room_epoch integer not null,
  slot integer not null,
  epoch integer not null,
  sha256 blob not null,
  library text not null,
  bytes blob not null,
  at integer not null,
  primary key (document, seq)
) strict;
