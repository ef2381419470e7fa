/*
 * The twin of benches/reads.rs over libkdumpfile: same list of pages, same checksum, same output.
 */
#include <fcntl.h>
#include <inttypes.h>
#include <libkdumpfile/kdumpfile.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

enum { PAGE = 4096 };

static double now(void)
{
	struct timespec ts;

	clock_gettime(CLOCK_MONOTONIC, &ts);
	return ts.tv_sec + ts.tv_nsec / 1e9;
}

static kdump_ctx_t *ctx;
static uint64_t count, sum;

static void read_page(uint64_t at)
{
	static uint64_t page[PAGE / 8];
	size_t length = PAGE;

	if (kdump_read(ctx, KDUMP_MACHPHYSADDR, at, page, &length) != KDUMP_OK || length != PAGE) {
		kdump_clear_err(ctx);
		return;
	}
	count++;
	for (int i = 0; i < PAGE / 8; i++)
		sum += page[i];
}

int main(int argc, char **argv)
{
	double start, opened, reading;
	uint64_t at;
	FILE *list;
	int fd;

	if (argc != 3) {
		fprintf(stderr, "usage: kdumpfile_reads DUMP LIST\n");
		return 2;
	}
	start = now();
	fd = open(argv[1], O_RDONLY);
	ctx = kdump_new();
	if (fd < 0 || !ctx || kdump_open_fd(ctx, fd) != KDUMP_OK) {
		fprintf(stderr, "%s: %s\n", argv[1], ctx ? kdump_get_err(ctx) : "out of memory");
		return 1;
	}
	opened = now();
	list = fopen(argv[2], "rb");
	if (!list) {
		perror(argv[2]);
		return 1;
	}
	reading = now();
	while (fread(&at, sizeof(at), 1, list) == 1)
		read_page(at);
	printf("{\"pages\": %" PRIu64 ", \"sum\": \"%016" PRIx64 "\", \"open\": %.6f, \"seconds\": %.6f}\n",
	       count, sum, opened - start, now() - reading);
	return 0;
}
