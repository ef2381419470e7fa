// SPDX-License-Identifier: GPL-2.0
/*
 * Runs a BPF program in the kernel: a filter on a socket that asks for a random
 * number and drops what comes. Says in the kernel's log before which functions
 * will be on the stack where that helper is probed (kstub_chain, how=bpf).
 */
#include <err.h>
#include <linux/bpf.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <unistd.h>

#ifndef SO_ATTACH_BPF
#define SO_ATTACH_BPF 50
#endif

static int bpf(int command, union bpf_attr *attributes)
{
	return syscall(SYS_bpf, command, attributes, sizeof(*attributes));
}

int main(void)
{
	struct bpf_insn program[] = {
		{ .code = BPF_JMP | BPF_CALL, .imm = BPF_FUNC_get_prandom_u32 },
		{ .code = BPF_ALU64 | BPF_MOV | BPF_K, .dst_reg = BPF_REG_0, .imm = 0 },
		{ .code = BPF_JMP | BPF_EXIT },
	};
	union bpf_attr load = {
		.prog_type = BPF_PROG_TYPE_SOCKET_FILTER,
		.insns = (uintptr_t)program,
		.insn_cnt = sizeof(program) / sizeof(program[0]),
		.license = (uintptr_t)"GPL",
		.prog_name = "kstub_filter",
	};
	struct bpf_prog_info info = { 0 };
	union bpf_attr ask = { .info = { .info_len = sizeof(info), .info = (uintptr_t)&info } };
	int sockets[2], i;
	FILE *log;

	int fd = bpf(BPF_PROG_LOAD, &load);

	if (fd < 0)
		err(1, "BPF_PROG_LOAD");
	ask.info.bpf_fd = fd;
	if (bpf(BPF_OBJ_GET_INFO_BY_FD, &ask))
		err(1, "BPF_OBJ_GET_INFO_BY_FD");
	if (socketpair(AF_UNIX, SOCK_DGRAM, 0, sockets))
		err(1, "socketpair");
	if (setsockopt(sockets[1], SOL_SOCKET, SO_ATTACH_BPF, &fd, sizeof(fd)))
		err(1, "SO_ATTACH_BPF");
	log = fopen("/dev/kmsg", "w");
	if (!log)
		err(1, "/dev/kmsg");
	fprintf(log, "kstub_chain: frames=kstub_probe_handler,bpf_user_rnd_u32,bpf_prog_");
	for (i = 0; i < BPF_TAG_SIZE; i++)
		fprintf(log, "%02x", info.tag[i]);
	fprintf(log, "_kstub_filter,sk_filter_trim_cap,unix_dgram_sendmsg\n");
	fclose(log);
	if (write(sockets[0], "x", 1) < 0)
		err(1, "write");
	errx(1, "nothing probes the helper");
}
