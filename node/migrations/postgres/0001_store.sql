-- All that may not be lost. Migrations are only ever added to: a node of an older version keeps
-- working on a newer schema.

-- One row: what the whole cluster agrees on.
create table control (
  only_row boolean primary key default true check (only_row),
  -- Fixed at creation.
  slots integer not null,
  -- One leadership of the operator; an older one changes nothing.
  term bigint not null default 0,
  holder text not null default '',
  -- Which node is to own which slot, by slot; empty when no operator ever planned.
  placement text[] not null default '{}',
  placement_version bigint not null default 0
);

-- One row per registered process; a new run of a pod replaces the row of the one before.
create table member (
  incarnation uuid primary key,
  pod_uid text not null unique,
  node text not null,
  address text not null,
  zone text not null,
  weight integer not null,
  state text not null,
  -- By this database's clock, as every time here.
  lease_end timestamptz not null,
  renewed_at timestamptz not null,
  load jsonb
) with (fillfactor = 50);

-- One row per share of the documents: who may write to them. Owner and epoch change only together.
create table slot (
  slot integer primary key,
  owner uuid,
  epoch bigint not null default 0,
  -- Transaction that changed the row last; a reader of the map asks for those it may have missed.
  revision bigint not null default 0,
  -- How often it was taken from a lost owner.
  adoptions bigint not null default 0
) with (fillfactor = 50);

create table document (
  -- In order of bytes, so that lists and pages do not depend on a locale.
  id text collate "C" primary key,
  slot integer not null,
  -- The life of the document: raised when a deleted one is created again.
  room_epoch bigint not null default 1,
  deleted boolean not null default false,
  -- Last seq of the life before; seq never starts again.
  base_seq bigint not null default 0,
  created_at timestamptz not null default clock_timestamp()
);

create table update_log (
  document text collate "C" not null,
  seq bigint not null,
  slot integer not null,
  epoch bigint not null,
  crc32c bigint not null,
  bytes bytea not null,
  author text not null,
  at timestamptz not null default clock_timestamp(),
  primary key (document, seq)
);

create table snapshot (
  document text collate "C" not null,
  seq bigint not null,
  room_epoch bigint not null,
  slot integer not null,
  epoch bigint not null,
  -- Over document, room epoch, seq and bytes: a row that belongs elsewhere does not verify.
  sha256 bytea not null,
  -- What encoded it.
  library text not null,
  bytes bytea not null,
  at timestamptz not null default clock_timestamp(),
  primary key (document, seq)
);
